"""What a user types and takes along: predictions, other calculators, films, the command line."""
