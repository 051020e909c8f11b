"""Documents -> tokens -> packed, resumable batches. Knows no model.

Start at ``data.dataset.open_data``. This module imports nothing, so that ``data.config`` can be read without
torch.
"""
