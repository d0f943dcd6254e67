"""How well a checkpoint transcribes: normalisers, error counts, confidence intervals, reports.

Text is stored raw and normalised only when it is scored, so a result file can be rescored later.
"""
