#include <stdio.h>

#ifndef VERSION
#define VERSION "unknown"
#endif

int main(void)
{
    puts("hello-deb " VERSION ", built by a farm");
    return 0;
}
