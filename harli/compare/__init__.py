"""Policies side by side: the same requests on one engine, interleaved, scored against decode alone."""
