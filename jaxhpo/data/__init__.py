"""Data sets, split into disjoint training, validation and test parts.

digits, mnist, fashion_mnist, cifar10: images, as `Split` of `Examples`
from jaxhpo.data._omniglot import omniglot
