"""The command line, one file a command: arguments in, library call, print."""
