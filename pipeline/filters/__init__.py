"""Filters that look at a trace alone: each is one pure call from a trace to None (keep) or a Drop with reason and evidence."""
