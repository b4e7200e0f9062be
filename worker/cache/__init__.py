"""Block bookkeeping: which block holds which tokens. Pure; knows no tensor and no clock."""
