"""mtkd."""
