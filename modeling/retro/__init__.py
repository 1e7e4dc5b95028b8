"""RETRO: chunks of tokens read neighbours found in a corpus."""
