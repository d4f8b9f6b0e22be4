"""What a job needs of its hardware, before the first chip-hour."""
