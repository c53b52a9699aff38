"""Other people's frameworks: each integration is imported on its own and needs only its own library."""
