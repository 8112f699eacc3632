"""Tiers behind the native ones: servers that nodes share. Each stands behind a guard, and none is needed."""
