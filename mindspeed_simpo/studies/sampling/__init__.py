"""On-policy pairs: answers of the model itself, scored; best against worst of each prompt. ``sample`` runs it."""
