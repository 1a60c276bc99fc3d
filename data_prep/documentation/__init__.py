"""Make pairs of real text from the documentation of installed packages."""
