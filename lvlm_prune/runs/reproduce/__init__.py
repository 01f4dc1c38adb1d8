"""Tables of the papers, run again: what was published beside what is measured here."""
