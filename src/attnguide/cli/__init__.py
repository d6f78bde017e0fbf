"""The command line, and the toolkit that commands of plugins share: options, progress bars, warnings."""
