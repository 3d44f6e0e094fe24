"""The commands of the command line, one module each; what they share prints in console.py and is read in options.py."""
