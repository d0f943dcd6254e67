"""From waveforms to transcripts: admission, queue, scheduler, device. Knows no HTTP."""
