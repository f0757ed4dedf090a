"""The bundled classifier: a small ResNet on handwritten digits, its trainer and its data."""
