"""What the user sees of a run while it trains and at its end: lines, alarms, answers, the closing summary."""
