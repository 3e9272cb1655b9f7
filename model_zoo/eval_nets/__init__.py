"""Fixed networks that losses and metrics use: VGG16, AlexNet, Inception. Their weights are files of the user's."""
