"""The whole pipeline as one function, and the folder of a run."""
