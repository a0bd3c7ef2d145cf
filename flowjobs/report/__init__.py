"""The table of an ablation, and its page: from the folders of the runs alone, without torch."""
