"""From a student to a folder that others load: the formats there are, what writes and verifies them, the model card."""
