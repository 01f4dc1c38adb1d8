"""One folder for each verb of the command line."""
