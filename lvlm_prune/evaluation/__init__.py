"""Scoring of models on questions with exact answers."""
