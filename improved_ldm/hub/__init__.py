"""Publish trained folders on the Hub, with model cards and evaluation results."""
