"""Integrations with inference engines: one module per engine, named after it.

Each imports its engine and the public names of `stratakv`, nothing else; none is imported by the package itself.
"""
