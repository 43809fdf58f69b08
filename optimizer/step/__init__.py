"""One step of the update: the paper's reference, the eager update, and the engines that compute the same faster."""
