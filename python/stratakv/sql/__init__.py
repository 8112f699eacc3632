"""The catalog's schema: numbered files, applied forward."""
