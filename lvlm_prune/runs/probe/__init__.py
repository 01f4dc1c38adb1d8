"""`probe`: what each modality's pathway through the Linears is worth (arXiv 2603.16001, section 3.2)."""
