"""One optimizer step: the paper's reference, the eager update, and the engines that compute the same update faster."""
