/* A unit test in the least words: CHECK(what must hold), and `return check_done("name")` at the end. */
#ifndef KATA_CHECK_H
#define KATA_CHECK_H

#include <stdio.h>

static unsigned check_count, check_failed;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        check_count++;                                                                             \
        if (!(condition)) {                                                                        \
            check_failed++;                                                                        \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                \
        }                                                                                          \
    } while (0)

static inline int check_done(const char *name)
{
    printf("%s: %u of %u checks passed\n", name, check_count - check_failed, check_count);
    return check_failed ? 1 : 0;
}

#endif
