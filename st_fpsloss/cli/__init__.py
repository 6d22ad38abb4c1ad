"""The console command ``st-fpsloss``: a module for each command, and the options that they share."""
