"""Code that exports copy into a folder for other libraries to run. The project itself never runs it."""
