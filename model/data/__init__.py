"""Manifests, audio files, augmentation and batches for training and evaluation."""
