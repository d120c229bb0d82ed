"""Commands: python -m densenet_jax.tools.NAME."""
