"""What each kind of `lsdl.analyze` measures of a run, a file for each subject."""
