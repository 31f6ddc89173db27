"""What is fuzzed with atheris."""
