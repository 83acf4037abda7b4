// The backward pass; a part of attention_variant.h, inside its namespace.
