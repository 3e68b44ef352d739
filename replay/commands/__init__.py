"""Console commands of the replay, a module each; `register` adds them to the program."""
