"""Weights on disk: readers of files, tables of formats, `load` and its inverse `save`."""
