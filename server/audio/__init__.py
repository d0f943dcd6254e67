"""From uploaded bytes to a waveform, in processes of their own."""
