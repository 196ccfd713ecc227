"""What a user types and takes along: predictions, other calculators, the command line."""
