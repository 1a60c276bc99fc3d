"""Scripts and recipes; ``launch.study`` is the one program among them that is Python."""
