"""Person re-identification on the public API of sn_ops: so far the evaluation protocol, re-ranking, reports, and the
export and use of a trained network. `pip install 'sn_ops[reid]'` has what it needs beyond PyTorch.
"""
