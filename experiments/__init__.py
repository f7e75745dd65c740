"""Measurements of the library, each one command; they use its public interface."""
