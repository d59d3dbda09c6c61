"""How fast clips are read, by this engine and by what users would otherwise run: `ssast bench loader`."""
