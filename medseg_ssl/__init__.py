"""Self-supervised and cross-modal pretraining for 3D medical imaging."""

__version__ = "0.1.0"
