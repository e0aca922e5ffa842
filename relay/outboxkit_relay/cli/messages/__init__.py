"""Messages on the command line: what is not published yet is seen, cancelled, sent elsewhere, or given up."""
