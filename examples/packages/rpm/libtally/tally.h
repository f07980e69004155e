#ifndef TALLY_H
#define TALLY_H

#include <stddef.h>

/* How many words a text has: runs of anything but white space. */
size_t tally_words(const char *text);

/* How many lines it has; the last one may lack its end. */
size_t tally_lines(const char *text);

#endif
