"""What the steps share. Imports point one way: steps -> mistral_ft -> libraries."""
