"""What tests share: toy environments, small policies, short runs of the programs, damaged files."""
