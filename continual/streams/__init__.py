"""Streams of image classification tasks."""
